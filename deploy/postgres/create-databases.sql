-- Runs once, when the data volume is created: MLflow keeps its tables apart from ours.
CREATE DATABASE mlflow;
