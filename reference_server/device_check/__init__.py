"""The first minutes on a device: does it compute what it should, how fast, and is that what is predicted?"""
