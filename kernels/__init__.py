"""Array engines: the contract of their ops (`ops`), what an engine is (`engine`), and the engines themselves."""
