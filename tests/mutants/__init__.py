"""Mutation testing: changes one place of the code at a time, and sees whether a test notices.

Cosmic Ray finds the places and makes the changes (``places``). A pytest run is forked from a process that has imported
the large libraries already (``runs``), in a copy of the repository, so that every process that a test starts has the
change. Which tests run is known from coverage (``covering``). ``python -m tests.mutants --help`` says how it is used.
"""
