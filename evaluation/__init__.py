"""Evaluation: any model on any panorama questions, the field's own formats included.

`items` says what a question is, `formats` reads files as they are released, `scores` judges answers, `run` asks a model
on any number of processes and goes on where it stopped, `report` writes what came out.
"""
