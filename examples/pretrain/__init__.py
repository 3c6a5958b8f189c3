"""Support modules of ``run_pretrain.py``: one topic a file, no framework.

flags.py       command line, presets, and every check that can be made before anything is loaded
tokenizer.py   bytes, a tokenizer folder, or a BPE trained on the corpus
data.py        documents -> held-out split -> packed blocks, with a position that can be saved
model.py       a small LLaMA with Hugging Face's module names
losses.py      next-token loss in chunks, evaluation
processes.py   the processes of one run
optimizers.py  the ten optimizer names and their parameter groups
schedules.py   warm-up and decay of the learning rate
checkpoint.py  atomic save, checked load
stopping.py    Ctrl-C and SIGTERM as a flag
report.py      log line, JSONL, memory, plot
"""
