"""The app: the pipeline as a page in the browser and as an API (extra ``diff2to3[app]``)."""
