"""Recognizers: each knows one kind of layer by what its module is, and by names last."""
