"""Local and remote files: path validation, atomic writes and retries. Imports only `ffdist.errors`."""
