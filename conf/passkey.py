"""The words of the passkey prompt (arXiv 2410.07145, appendix B.1).

Here and not in data/, so that a config can be checked against them without importing torch.
"""

OPENING = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
FILLER = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
NEEDLE = (
    " The passkey is",
    ". Remember it.",
    " is the passkey.",
)  # the key stands before the 2nd and 3rd part
QUESTION = " What is the pass key? The passkey is"
