# SPDX-License-Identifier: Apache-2.0
"""Leave a random sample of the mutants in a session of cosmic-ray's; see tests/README.md."""

import random
import re
import sqlite3
import sys

SIZE, SEED = 150, 20261126
# Mutants that say nothing: powers, shifts and bits for arithmetic, `is`, the `|` of annotations.
SENSELESS = re.compile(
    r"BinaryOperator_.*(Pow|Shift|BitOr|BitAnd|BitXor|Mod|FloorDiv)$"
    r"|BinaryOperator_(BitOr|BitAnd|LShift|FloorDiv)_"
    r"|_Is$|_IsNot$|Operator_Is_(?!IsNot)|Comparison.*_Is_|USub_Invert"
)
ALL = """
    select job_id, operator_name from mutation_specs
    order by module_path, start_pos_row, start_pos_col, operator_name, occurrence
"""


def main(session: str) -> None:
    database = sqlite3.connect(session)
    jobs = database.execute(ALL).fetchall()
    sensible = [job for job, operator in jobs if not SENSELESS.search(operator)]
    kept = set(random.Random(SEED).sample(sensible, SIZE))
    dropped = [(job,) for job, _ in jobs if job not in kept]
    for table in ("mutation_specs", "work_items"):
        database.executemany(f"delete from {table} where job_id = ?", dropped)
    database.commit()
    print(f"{len(jobs)} mutants, {len(sensible)} of them sensible, {len(kept)} drawn")


if __name__ == "__main__":
    main(sys.argv[1])
