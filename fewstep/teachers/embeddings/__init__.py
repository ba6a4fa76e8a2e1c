"""Extra inputs of a student's network (guidance scale, progress of the target time), which export folds into its weights.

`unet` and `transformer` attach them to networks of diffusers, under the weights' own names, and fold them.
"""
