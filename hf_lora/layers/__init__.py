"""How an adapter layer computes: what its strength means, and which weights it merges into.

Works on one tuner layer at a time and on peft's own formulas; models, hosts and records are above.
"""
