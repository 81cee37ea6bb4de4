"""Damage: found, survived, repaired.

verify         read everything that a version names
blocks         blocks of files: checked, and made again
decode_check   shards that decode, and say what their manifest says
parity         parity files: made
repair         damaged files: made again
mirrors        small files that lie on all roots: made equal
health         what losing a disk would cost
"""

__all__: list[str] = []
