"""Support modules of ``run_glue.py``: one topic a file, no framework.

flags.py     command line, and every check that can be made before anything is loaded
tasks.py     the nine tasks of GLUE: columns, files, labels, metrics
files.py     rows out of TSV, CSV, JSON and JSON lines
data.py      training and validation texts from the hub, from GLUE's folders or from files
metrics.py   accuracy, F1, Matthews and Pearson/Spearman correlation
methods.py   AdamW, GaLore and Q-GaLore out of the flags
train.py     one run: model, batches, updates, evaluation
results.py   finished runs of a folder, and the table over them
"""
