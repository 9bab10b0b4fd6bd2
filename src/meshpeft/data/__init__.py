"""Data: from files, or the embedded set, to the micro-batches of each rank.

    files       -> rows of JSON, CSV and Parquet files
    records     -> records of one format: text, prompt/completion or chat
    documents   -> token ids, and which of them are targets (chat, templates, tokenizers)
    batches     -> packed rows, and each data-parallel rank's micro-batches of a step
    context     -> the tokens of a row that each context-parallel rank computes

All of these are pure functions of what is in the files and of their arguments, so ranks that read the same files get
the same data in the same order.
"""
