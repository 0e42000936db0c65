"""Maps the top-level folders to the import packages penstock.actors, penstock.engine and penstock.clients, sub-packages included."""

from setuptools import find_packages, setup

tops = ("actors", "engine", "clients")
packages = {f"penstock.{top}": top for top in tops}
for top in tops:
    packages |= {f"penstock.{top}.{sub}": f"{top}/{sub.replace('.', '/')}" for sub in find_packages(top)}

setup(packages=list(packages), package_dir=packages)
