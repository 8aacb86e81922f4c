"""The programs are run by test_wild.py, where ``pytorch_lightning`` is puretrain's."""

collect_ignore = ["programs"]
