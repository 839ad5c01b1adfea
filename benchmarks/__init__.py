"""The benchmark suite: ops, training steps and time to accuracy, each checked before it is timed.

`cases` and its neighbours describe what is measured, `measure` measures it, `report` and `pictures` read the JSON that
comes out. ``fastbp bench`` and ``pytest benchmarks`` are two faces of it.
"""
