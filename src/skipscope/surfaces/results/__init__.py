"""What a surface is when it is done: values, scores, exports."""
