"""The study of SignalLARS on CIFAR-10: many short runs side by side on one GPU, by the product's own optimizers.

`python -m research.cifar10.run --data train.parquet --out runs.jsonl --seconds 300` does runs, most important first;
`python -m research.cifar10.report --runs FOLDER --output FOLDER` makes each table and figure from the kept runs.
"""
