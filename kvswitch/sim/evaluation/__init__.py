"""The paper's evaluation, simulated: figures, verdicts and the report."""
