"""The prediction protocols: V1, and V2, the Open Inference Protocol."""
