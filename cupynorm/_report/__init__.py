"""What would run, what is there, and whether it is right: `explain`, `show_config`, the self-check.

Everything of the library may be imported from here; only `__init__` and `__main__` import this.
"""
