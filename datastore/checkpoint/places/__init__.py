"""Where steps are kept besides one storage: in a second one, or in the memory of other ranks.

two       two places behind one checkpointer
memory    MemoryCheckpointer: each step in the memory of two ranks
holding   what each rank has of such a step, and who is to have what
peers     the ranks of a gloo group
"""

__all__: list[str] = []
