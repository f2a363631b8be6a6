//! An agent's firewall as nft lists it, in a form in which two listings can be compared.
//!
//! Pure: the listings come from [`super::nft`].

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::Difference;

/// Tables, chains and sets with their definitions, the elements of sets, the rules of chains.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ruleset {
    /// "inet set bridges" and its definition without elements and handles.
    objects: BTreeMap<String, String>,
    /// Elements by "inet bridges".
    elements: BTreeMap<String, BTreeSet<String>>,
    /// Rules in order by "inet forward".
    rules: BTreeMap<String, Vec<Rule>>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Rule {
    /// The rule's expressions and comment as JSON.
    text: String,
    /// What the rule is for.
    comment: Option<String>,
}

impl Ruleset {
    /// Takes the objects of nft's JSON listing apart.
    pub(super) fn parse(objects: Vec<Value>) -> Self {
        let mut ruleset = Self::default();
        for object in objects {
            let Value::Object(object) = object else { continue };
            for (kind, body) in object.into_iter().filter(|(kind, _)| kind != "metainfo") {
                ruleset.add(&kind, body);
            }
        }
        ruleset
    }

    fn add(&mut self, kind: &str, mut body: Value) {
        if let Value::Object(fields) = &mut body {
            // Handles count up; they say nothing about what an object does.
            fields.remove("handle");
        }
        let family = text(&body["family"]).to_owned();
        if kind == "rule" {
            let chain = format!("{family} {}", text(&body["chain"]));
            let comment = body["comment"].as_str().map(str::to_owned);
            let rule = Rule { text: body.to_string(), comment };
            self.rules.entry(chain).or_default().push(rule);
            return;
        }
        let name = text(&body["name"]).to_owned();
        if let Value::Object(fields) = &mut body
            && let Some(Value::Array(listed)) = fields.remove("elem")
        {
            let elements = listed.iter().map(element_text).collect();
            self.elements.insert(format!("{family} {name}"), elements);
        }
        self.objects.insert(format!("{family} {kind} {name}"), body.to_string());
    }

    /// How this ruleset differs from `expected`.
    pub(super) fn differences(&self, expected: &Self) -> Vec<Difference> {
        let mut differences = Vec::new();
        for (object, definition) in &expected.objects {
            match self.objects.get(object) {
                None => differences.push(Difference::FirewallMissing { object: object.clone() }),
                Some(found) if found != definition => {
                    differences.push(Difference::FirewallDefinition { object: object.clone() });
                }
                Some(_) => {}
            }
        }
        for object in self.objects.keys().filter(|object| !expected.objects.contains_key(*object)) {
            differences.push(Difference::FirewallUnexpected { object: object.clone() });
        }
        self.element_differences(expected, &mut differences);
        self.rule_differences(expected, &mut differences);
        differences
    }

    fn element_differences(&self, expected: &Self, differences: &mut Vec<Difference>) {
        let none = BTreeSet::new();
        let sets: BTreeSet<_> = self.elements.keys().chain(expected.elements.keys()).collect();
        for set in sets {
            let found = self.elements.get(set).unwrap_or(&none);
            let wanted = expected.elements.get(set).unwrap_or(&none);
            differences.extend(wanted.difference(found).map(|element| {
                Difference::ElementMissing { set: set.clone(), element: element.clone() }
            }));
            differences.extend(found.difference(wanted).map(|element| {
                Difference::ElementUnexpected { set: set.clone(), element: element.clone() }
            }));
        }
    }

    fn rule_differences(&self, expected: &Self, differences: &mut Vec<Difference>) {
        let chains: BTreeSet<_> = self.rules.keys().chain(expected.rules.keys()).collect();
        for chain in chains {
            let found = self.rules.get(chain).map_or(&[][..], Vec::as_slice);
            let wanted = expected.rules.get(chain).map_or(&[][..], Vec::as_slice);
            if found == wanted {
                continue;
            }
            let before = differences.len();
            differences.extend(surplus(wanted, found).map(|rule| Difference::RuleMissing {
                chain: chain.clone(),
                rule: rule.comment.clone().unwrap_or_else(|| rule.text.clone()),
            }));
            differences.extend(surplus(found, wanted).map(|rule| Difference::RuleUnexpected {
                chain: chain.clone(),
                rule: rule.text.clone(),
            }));
            if differences.len() == before {
                differences.push(Difference::RuleOrder { chain: chain.clone() });
            }
        }
    }
}

/// The rules of `these` that `those` lack, counting repetitions.
fn surplus<'a>(these: &'a [Rule], those: &[Rule]) -> impl Iterator<Item = &'a Rule> {
    let mut left: Vec<&Rule> = those.iter().collect();
    let mut surplus = Vec::new();
    for rule in these {
        match left.iter().position(|other| *other == rule) {
            Some(found) => {
                left.swap_remove(found);
            }
            None => surplus.push(rule),
        }
    }
    surplus.into_iter()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// An element as nft's syntax has it, near enough to be read; JSON where there is more to it.
fn element_text(element: &Value) -> String {
    match element {
        Value::String(text) => text.clone(),
        Value::Object(fields) => match (fields.get("concat"), fields.get("prefix")) {
            (Some(Value::Array(parts)), _) => {
                parts.iter().map(element_text).collect::<Vec<_>>().join(" . ")
            }
            (_, Some(prefix)) => format!("{}/{}", text(&prefix["addr"]), prefix["len"]),
            _ => element.to_string(),
        },
        _ => element.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ruleset(elements: &[&str], rules: &[&str]) -> Ruleset {
        let mut objects = vec![
            json!({"metainfo": {"version": "1.0.6"}}),
            json!({"table": {"family": "inet", "name": "mvm", "handle": 7}}),
            json!({"set": {"family": "inet", "name": "taps", "table": "mvm", "type": "ifname",
                "handle": 8, "elem": elements}}),
            json!({"chain": {"family": "inet", "table": "mvm", "name": "forward", "handle": 9}}),
        ];
        objects.extend(rules.iter().enumerate().map(|(handle, rule)| {
            json!({"rule": {"family": "inet", "table": "mvm", "chain": "forward",
                "handle": handle, "comment": rule, "expr": [{"drop": null}]}})
        }));
        Ruleset::parse(objects)
    }

    fn differences(found: &Ruleset, expected: &Ruleset) -> Vec<String> {
        found.differences(expected).iter().map(Difference::to_string).collect()
    }

    #[test]
    fn handles_and_the_order_of_elements_do_not_matter() {
        let (found, expected) = (ruleset(&["a", "b"], &["r"]), ruleset(&["b", "a"], &["r"]));
        assert_eq!(differences(&found, &expected), [""; 0]);
    }

    #[test]
    fn elements_and_rules_are_named_when_they_differ() {
        let (found, expected) = (ruleset(&["a"], &["x", "z"]), ruleset(&["b"], &["x", "y"]));
        let text = differences(&found, &expected);
        assert_eq!(text[0], "element missing in set inet taps: b");
        assert_eq!(text[1], "unexpected element in set inet taps: a");
        assert_eq!(text[2], "rule missing in chain inet forward: y");
        assert!(text[3].starts_with("unexpected rule in chain inet forward: {"), "{}", text[3]);
        assert_eq!(text.len(), 4);
    }

    #[test]
    fn a_repeated_rule_and_a_changed_order_are_seen() {
        let expected = ruleset(&[], &["x", "y"]);
        let repeated = differences(&ruleset(&[], &["x", "y", "y"]), &expected);
        assert!(matches!(repeated.as_slice(), [one] if one.starts_with("unexpected rule")));
        let swapped = differences(&ruleset(&[], &["y", "x"]), &expected);
        assert_eq!(swapped, ["rules of chain inet forward are out of order"]);
    }

    #[test]
    fn missing_and_unexpected_objects_are_named() {
        let (nothing, something) = (Ruleset::default(), ruleset(&["a"], &["x"]));
        let text = differences(&nothing, &something);
        assert!(text.contains(&"firewall inet table mvm is missing".to_owned()), "{text:?}");
        let text = differences(&something, &nothing);
        assert!(text.contains(&"firewall inet set taps is unexpected".to_owned()), "{text:?}");
    }
}
