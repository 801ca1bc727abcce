"""What the tests do with a real scheduler: ``python scenes NAME '{"argument": ...}'``.

Each function asserts what must hold, and returns what the test is to look at.
"""
