"""What the book needs but is not about: plain Python, written by hand.

Tools know nothing of the chapters, except `config`.
"""
