"""The kinds of places.

local            files of this machine
syscalls         what the kernel does in one step, and Python does not wrap
memory           this process, for tests
s3               S3 without an event loop
fsspec_storage   whatever fsspec reaches
schemes          what each of those can do: one row for each scheme
unfinished       what a killed writer leaves there
web              any web server, to be read
zip_archive      a zip file, to be read
"""

__all__: list[str] = []
