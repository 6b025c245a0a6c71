// Reads ops.txt. What is wrong in it is a fault of ours: std::logic_error, seen by the tests.
#include <map>
#include <sstream>
#include <tuple>

#include "ops.h"
#include "plans.h"

namespace edge {
namespace {

const char* const TEXT =
#include "ops.txt"
    ;

const std::map<std::string, int> TYPES = {{"f32", EDGE_F32}, {"f16", EDGE_F16}, {"i8", EDGE_I8}, {"i32", EDGE_I32}};

std::string trimmed(const std::string& text) {
    const size_t first = text.find_first_not_of(' ');
    return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(' ') - first + 1);
}

/// Parts between `separator`s outside of round brackets, trimmed; none for an empty text.
std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    int depth = 0;
    size_t from = 0;
    for (size_t i = 0; i <= text.size(); ++i) {
        if (i < text.size() && text[i] == '(') ++depth;
        if (i < text.size() && text[i] == ')') --depth;
        if (i < text.size() && (text[i] != separator || depth)) continue;
        parts.push_back(trimmed(text.substr(from, i - from)));
        from = i + 1;
    }
    if (parts.size() == 1 && parts[0].empty()) parts.clear();
    return parts;
}

std::pair<std::string, std::string> cut(const std::string& text, char at) {
    const size_t found = text.find(at);
    if (found == std::string::npos)
        throw std::logic_error("ops.txt: no '" + std::string(1, at) + "' in '" + text + "'");
    return {trimmed(text.substr(0, found)), trimmed(text.substr(found + 1))};
}

std::string substituted(std::string text, const std::map<std::string, std::string>& macros) {
    for (size_t at; (at = text.find('$')) != std::string::npos;) {
        size_t end = at + 1;
        while (end < text.size() && (std::isalnum(static_cast<unsigned char>(text[end])) || text[end] == '_')) ++end;
        text.replace(at, end - at, macros.at(text.substr(at + 1, end - at - 1)));
    }
    return text;
}

Pattern pattern(const std::string& text) {
    Pattern shape;
    for (const std::string& dim : split(text.substr(1, text.size() - 2), ',')) {
        if (dim == "...") {
            shape.open = true;
        } else {
            shape.dims.push_back(dim);
        }
    }
    return shape;
}

Input input(const std::string& text) {
    const auto [name, rest] = cut(text, ' ');
    const auto [types, shape] = cut(rest, ' ');
    Input made{name, {}, pattern(shape)};
    for (const std::string& type : split(types, '|')) made.types.push_back(TYPES.at(type));
    return made;
}

Output output(const Op& op, const std::string& text) {
    const auto [name, rest] = cut(text, ' ');
    const auto [type, shape] = cut(rest, ' ');
    if (type != "like") return {name, TYPES.at(type), pattern(shape), -1};
    const int like = op.input(shape);
    if (like < 0 || op.inputs[size_t(like)].types.size() != 1) throw std::logic_error("ops.txt: " + text);
    return {name, op.inputs[size_t(like)].types[0], op.inputs[size_t(like)].shape, like};
}

void add_line(Op& op, const std::string& key, const std::string& text) {
    if (key == "in") {
        for (const std::string& part : split(text, ';')) op.inputs.push_back(input(part));
    } else if (key == "out") {
        for (const std::string& part : split(text, ';')) op.outputs.push_back(output(op, part));
    } else if (key == "attr") {
        for (const std::string& part : split(text, ';')) {
            const auto [name, type] = cut(part, ' ');
            op.attributes.push_back({name, type == "float"});
        }
    } else if (key == "check") {
        for (const std::string& part : split(text, ';')) {
            const auto [subject, condition] = cut(part, ':');
            op.checks.push_back({subject, condition});
        }
    } else if (key == "plan") {
        const auto [name, fields] = cut(text, ':');
        op.plan_fields = split(fields, ',');
        op.plan = planner(name, op.plan_fields.size());
    } else if (key == "work") {
        std::tie(op.workspace, op.workspace_bytes) = cut(text, ':');
    } else if (key == "args") {
        const auto [tensors, numbers] = cut(text, ';');
        op.tensor_arguments = split(tensors, ',');
        op.number_arguments = split(numbers, ',');
    } else if (key != "aot") {  // Python's
        throw std::logic_error("ops.txt: " + op.name + " has a line '" + key + "'");
    }
}

template <class Parts>
int index_of(const Parts& parts, const std::string& name) {
    for (size_t i = 0; i < parts.size(); ++i)
        if (parts[i].name == name) return int(i);
    return -1;
}

std::vector<Op> parsed() {
    std::vector<Op> made;
    std::map<std::string, std::string> macros;
    std::istringstream lines(TEXT);
    for (std::string raw; std::getline(lines, raw);) {
        if (raw.empty() || raw[0] == '#') continue;
        const std::string line = raw.compare(0, 4, "let ") ? substituted(raw, macros) : raw;
        if (line.find(' ') == std::string::npos) {
            made.emplace_back();
            made.back().name = line;
            continue;
        }
        const auto [key, text] = cut(line, ' ');
        if (key == "let") {
            const auto [name, value] = cut(text, '=');
            macros[name] = value;
        } else {
            add_line(made.back(), key, text);
        }
    }
    return made;
}

}  // namespace

int Op::attribute(const std::string& wanted) const { return index_of(attributes, wanted); }
int Op::input(const std::string& wanted) const { return index_of(inputs, wanted); }
int Op::output(const std::string& wanted) const { return index_of(outputs, wanted); }

const std::vector<Op>& ops() {
    static const std::vector<Op> table = parsed();
    return table;
}

const Op& find_op(const std::string& name) {
    std::string known;
    for (const Op& op : ops()) {
        if (op.name == name) return op;
        known += (known.empty() ? "" : ", ") + op.name;
    }
    throw Refusal("there is no op " + name + "; there are " + known);
}

}  // namespace edge
