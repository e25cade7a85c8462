"""`python -m tests.kernels.update_aot_table`: rewrites the table for the installed Triton.

Entries of other Triton versions stay as they are; kernels and specialisations that no longer
exist go.
"""

import json

from tests.kernels.aot_variants import ALL_SM, TABLE_PATH, VARIANTS, Table, read_table
from tests.support.aot import TRITON_MINOR, compile_variant


def main() -> None:
    old = read_table()
    table: Table = {}
    for variant in VARIANTS:
        for sm in ALL_SM:
            resources, _ = compile_variant(variant, sm)
            key = (variant.kernel_name, variant.name, f"sm_{sm}")
            versions = old.get(key[0], {}).get(key[1], {}).get(key[2], {})
            row = versions | {TRITON_MINOR: resources.as_dict()}
            table.setdefault(key[0], {}).setdefault(key[1], {})[key[2]] = row
            print(*key, resources)
    TABLE_PATH.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
