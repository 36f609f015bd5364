"""Modules that own parameters, under the names that the contract declares."""
