"""`python -m tests.kernels.update_aot_table [KERNEL ...]`: rewrites the table for this Triton.

Two processes compile; with names of kernels, only those. Entries of other Triton versions stay as
they are; kernels and specialisations that no longer exist go.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor

from tests.kernels.aot_variants import COMPILES, TABLE_PATH, Table, read_table
from tests.support.aot import TRITON_MINOR, compile_variant


def resources_of(index: int) -> dict[str, int]:
    """By number, as kernels do not travel between processes."""
    variant, sm = COMPILES[index]
    return compile_variant(variant, sm)[0].as_dict()


def main() -> None:
    wanted = set(sys.argv[1:])
    chosen = [
        index
        for index, (variant, _) in enumerate(COMPILES)
        if not wanted or variant.kernel_name in wanted
    ]
    with ProcessPoolExecutor(2) as pool:
        made = dict(zip(chosen, pool.map(resources_of, chosen), strict=True))
    old = read_table()
    table: Table = {}
    for index, (variant, sm) in enumerate(COMPILES):
        key = (variant.kernel_name, variant.name, f"sm_{sm}")
        versions = old.get(key[0], {}).get(key[1], {}).get(key[2], {})
        row = versions | ({TRITON_MINOR: made[index]} if index in made else {})
        table.setdefault(key[0], {}).setdefault(key[1], {})[key[2]] = row
    TABLE_PATH.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"{len(made)} compiled with Triton {TRITON_MINOR}, {TABLE_PATH}")


if __name__ == "__main__":
    main()
