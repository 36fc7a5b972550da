"""Jobs to and from other tools: Optuna studies, TensorBoard, tables."""
