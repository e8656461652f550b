"""The loops behind train.py and validate.py."""
