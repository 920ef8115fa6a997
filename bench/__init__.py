# SPDX-License-Identifier: Apache-2.0
"""What each way of computing softmax cross-entropy costs, and how exact it is.

`python -m bench --help` lists the commands. Every command measures into one *section*: a plain
dictionary that goes to a JSON file as it is, and from which its tables are printed. So a table can
be printed again from a committed file.

    cases.py        what is measured: shapes, dtypes, modes, their inputs, bytes and flops
    contenders/     who is measured: one module a package, plain functions
    timing.py       how: compiled ahead, warmed up, interleaved, memory donated
    roofs.py        what the device can do at most
    environment.py  where and with which versions
    options.py      what the commands share of their command lines
    results.py      the JSON file, geometric means
    terminal.py     tables to stdout, progress and notes to stderr
    markdown.py     tables for README and docs
    figures.py      what all figures have in common
    speed.py  memory.py  accuracy.py
                    the commands: measure(), then tables and figures of what was measured
    speed_tables.py  accuracy_tables.py
                    those of speed and accuracy
    peak.py  sharding.py
                    memory --peak, memory --mesh
    report.py       tables and figures of README and docs, from the committed files
"""
