# SPDX-License-Identifier: Apache-2.0
"""What each way of computing softmax cross-entropy costs, and how exact it is; divergences too.

`python -m bench --help` lists the commands. Every command measures into one *section*: a plain
dictionary that goes to a JSON file as it is, and from which its tables are printed. So a table can
be printed again from a committed file.

    cases.py        what is measured: shapes, dtypes, modes, their inputs, bytes and flops
    contenders/     who is measured: one module per package, plain functions
    timing.py       how: compiled ahead, warmed up, interleaved, memory donated; the device's roof
    formula.py      what memory our heads need, as their docstrings say it
    collectives.py  what a compiled program sends between devices
    environment.py  where and with which versions
    options.py      what the commands share of their command lines
    results.py      the JSON file
    tables.py       a table, laid out once for terminal, README and docs; lines and progress
    figures.py      what all figures have in common
    speed.py  memory.py  accuracy.py
                    the commands: measure(), then tables and figures of what was measured
    speed_tables.py  accuracy_tables.py
                    those of speed and accuracy
    divergence_accuracy.py
                    accuracy --op divergence
    targets.py calibration.py
                    speed --target and --calibrate
    sharding.py     memory --mesh
    summary.py      README's tables: a few rows of those of all devices
    report.py       tables and figures of README and docs, from the committed files

What a program takes on a TPU by its compiler's account is `jaxsoftmax.training.tpu`.
"""
