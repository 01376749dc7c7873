"""Speed that is swapped into a finished model from outside, by one call each.

Exported from the chapters of the part "Make it fast".
"""
