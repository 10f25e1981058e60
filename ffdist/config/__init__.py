"""The configuration: its schema, loading and validation, and the network that it describes.

Imports only `ff` and `errors` from this package, so that an invalid setting is reported within a second.
"""
