"""The grader: finds the answer in a text and compares it with a reference, evaluating nothing."""
