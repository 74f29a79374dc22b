"""Attention scores that are not computed until something other than attention is done to them.

scores.py    what is known of deferred scores or weights, and their product with values, by `attention`
tensor.py    the tensor that stands for them, and the mode that makes it of a product
steps.py     the operations that leave a tensor deferred
products.py  which products are those of queries and keys, or of weights and values
"""
