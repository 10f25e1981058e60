"""The shape of the computation: which stage holds which layers, what travels, in which order."""
