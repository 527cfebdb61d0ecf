"""One HTML page of what was trained, pruned, exported, swept and timed: read (`facts`), drawn (`charts`), laid out.

Only JSON is loaded, so a page takes a fraction of a second.
"""
