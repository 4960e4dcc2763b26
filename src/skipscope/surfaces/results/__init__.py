"""Results of surfaces: values, scores, exports."""
