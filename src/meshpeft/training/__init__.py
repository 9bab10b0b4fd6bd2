"""Training: from the options of a command to what it writes and prints.

finetune, evaluate, generate, export    the commands
config                                  the options of all of them
base, adapters, inputs                  what is trained, and on what; same_inputs: the same on every rank
loop, step                              when what happens; the arithmetic of one step
checkpoints, output, report             what is kept, written and printed
launch, streams                         the processes, their signals and their streams
"""
