//! The command lines of Firecracker and its jailer: options that each take a value. What is not
//! known is refused, as they do.

/// Options with their values, in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct Arguments(Vec<(String, String)>);

impl Arguments {
    /// Takes the words apart.
    pub(crate) fn parse(words: &[String], known: &[&str]) -> Result<Self, String> {
        let mut arguments = Self::default();
        let mut words = words.iter();
        while let Some(name) = words.next() {
            if !known.contains(&name.as_str()) {
                return Err(format!(
                    "Arguments parsing error: Found argument '{name}' which wasn't expected, or \
                     isn't valid in this context."
                ));
            }
            let value = words.next().ok_or_else(|| {
                format!(
                    "Arguments parsing error: The argument '{name}' requires a value, but none was \
                     supplied."
                )
            })?;
            arguments.0.push((name.clone(), value.clone()));
        }
        Ok(arguments)
    }

    /// The value of an option that was given.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(given, _)| given == name).map(|(_, value)| value.as_str())
    }

    /// The value of an option that has to be given.
    pub(crate) fn needed(&self, name: &str) -> Result<&str, String> {
        self.get(name).ok_or_else(|| {
            format!("Arguments parsing error: Argument '{name}' required, but not found.")
        })
    }
}
