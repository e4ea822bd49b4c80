def parts():
    return {}
