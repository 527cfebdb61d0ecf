"""How long it takes: one weight (`matmul`) or whole models (`endtoend`), as records that `render` draws.

Nothing is imported here, so that the command line can name the parts without paying for torch.
"""
