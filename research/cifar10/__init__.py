"""The study of SignalLARS on CIFAR-10: many short runs side by side on one GPU, by the product's own optimizers.

`python -m research.cifar10.run --data train.parquet --out runs.jsonl --parts verdict --seconds 540` does the runs that
decide the verdict, most important first, and goes on where a file of runs ends. `python -m research.cifar10.rows --runs
runs.jsonl` adds them to those that are kept, `python -m research.cifar10.report` makes tables and pictures of them, and
`python -m research.cifar10.verdict` applies the rule of `verdict.yaml`.
"""
