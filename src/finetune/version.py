"""The project's version, as in CHANGELOG.md and CITATION.cff.

No stage imports it: a release is no reason to train anything anew.
"""

__version__ = "1.0.0"
