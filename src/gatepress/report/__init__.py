"""One HTML page of what was trained, pruned, exported, swept and timed: read (`facts`), drawn (`charts`), laid out.

Nothing is loaded but JSON, so a page takes a fraction of a second.
"""
