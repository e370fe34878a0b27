"""What is done with a pipeline besides drawing: editing by Stable Flow, importance studies, scores, calibration."""
