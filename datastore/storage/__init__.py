"""Bytes by key, on any URL: the only place that knows fsspec.

base         the contract: every storage, every promise
resolve      from a URL to its storage
urls         URLs as text, without secrets
backends     one module for each kind of place
wrappers     storages over another one: a subfolder, links to other places
placed       one storage on several roots, by the rules of whoever lays keys out
rendezvous   which roots a key lies on
hedging      calls to places that may hang
verified     bytes that have the digest that they should have
as_fsspec    a storage as a read-only fsspec file system
retry        requests that are repeated and counted
ranges       many ranges at once, straight into buffers
errors       what a kernel or a library raised, as an error of ours
statistics   requests, bytes, retries, seconds
"""

__all__: list[str] = []
