"""A custom engine on the kvswitch API, and the demo that compares ways of preempting with it.

`engine.py` is the guide for authors of engines; `model.py` is the model it serves; `run.py` serves
a workload in each mode, and `report` writes down what came of it.
"""
