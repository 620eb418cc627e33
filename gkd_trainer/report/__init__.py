"""Reports: logged metrics, tables of completions and stages, and the model card."""
