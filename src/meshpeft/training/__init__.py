"""The fine-tune: options, step, loop, report, export."""
